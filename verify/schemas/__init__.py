"""JSON Schemas of what commands print with --json, a file a command."""
