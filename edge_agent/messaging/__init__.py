"""MQTT: one client, the durable outbox, commands."""
