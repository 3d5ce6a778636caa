"""CRIU's own message definitions (MIT) and the Python generated from them; see README.md here."""
