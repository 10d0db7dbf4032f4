"""Where retrieval fails, and its report."""
