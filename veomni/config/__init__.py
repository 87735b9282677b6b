"""What any configuration is made of: sections, YAML files, overrides, and errors that name every key at once."""
