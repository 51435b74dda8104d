"""Other libraries' names for what this one does: their scripts run by changed imports."""
