"""The command `oa-train`: turns options and YAML into objects, and errors into messages and exit statuses."""
