"""Questions asked of trained circuits and constants; answers as tables, figures and results.json."""
