"""The command ``scbert``: its verbs and their options, the frame that runs them, and the page in the browser."""
