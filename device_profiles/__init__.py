"""Device profiles as data: one TOML file each. Nothing here is code; see README.md beside this file."""
