"""An HTTP server: embeddings, classification, search of a library, and a page for people."""
