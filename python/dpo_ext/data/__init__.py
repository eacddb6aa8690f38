"""From files, rows and tables to ids; NumPy alone."""
