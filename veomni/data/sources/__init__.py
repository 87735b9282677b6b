"""Where documents come from: files, formats, mixtures, built-in corpora."""
