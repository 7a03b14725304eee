"""Guesses about which experts come next. Nothing here moves or executes anything."""
