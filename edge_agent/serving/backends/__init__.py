"""Model runtimes behind one interface, each third-party runtime in one file."""
