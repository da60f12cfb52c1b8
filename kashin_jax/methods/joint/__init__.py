"""From a matrix to codes: the Kashin coder and the controls it is compared with."""
