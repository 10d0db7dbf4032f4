"""HTML reports: page frame, tables, charts."""
