"""Operations of this field that torch has not, and rules for libraries that have them."""
