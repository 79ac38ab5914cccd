"""The registry: a TUF repository in a folder that any static web server can serve."""
