"""Many requests at once: pages and plans without torch in `blocks` and `scheduler`."""
