"""The operator's program: publishes signed bundles, rolls them out, watches. It runs on no device."""
