"""Other people's models made sequence-parallel."""
