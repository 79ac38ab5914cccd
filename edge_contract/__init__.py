"""What the three programs agree on: manifest, device facts, topics, messages, reason codes. No I/O here."""
