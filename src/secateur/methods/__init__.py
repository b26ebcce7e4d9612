"""One file per published system, in rooms by what is removed. A method imports parts, never a method."""
