"""The best ladders for observed traffic: costs, search, plans. Nothing here compiles."""
