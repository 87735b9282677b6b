"""Models from a name, a directory or a configuration: on the meta device, with the parts that are chosen."""
