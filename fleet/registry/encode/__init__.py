"""Making what `registry publish` offers beside whole blobs: compressed ones and patches."""
