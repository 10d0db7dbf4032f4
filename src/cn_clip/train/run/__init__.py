"""A run on disk: folder, checkpoints, log, report, loss watchdog, stop signals."""
