"""Many requests at once: `engine` for callers; pages and plans without torch in `blocks` and `scheduler`."""
