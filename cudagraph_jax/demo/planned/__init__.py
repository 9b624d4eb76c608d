"""`demo --plan`: a grid planned from the first of the traffic, against powers of two."""
