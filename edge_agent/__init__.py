"""The device's program: a control process (`run`) and an inference process (`serve`)."""
