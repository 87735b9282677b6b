"""The mesh of ranks and the plan of a model: the only place where layouts are computed."""
