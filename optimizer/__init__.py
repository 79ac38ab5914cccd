"""edge-optimize: a trained model, a device profile and data in; the best measured candidate out, bundled."""
