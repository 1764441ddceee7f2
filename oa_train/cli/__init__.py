"""The command `oa-train`: options and YAML in, objects out, errors to messages and exit status."""
