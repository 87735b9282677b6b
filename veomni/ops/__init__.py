"""Operations: one function each, with backends behind it."""
