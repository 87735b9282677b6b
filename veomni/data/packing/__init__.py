"""The global order of documents and how they fill rows."""
