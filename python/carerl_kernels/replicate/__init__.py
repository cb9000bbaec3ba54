"""Does it help? A declarative grid of settings, methods and seeds, resumable by cell, and a report of what is significant."""
