"""`deem plan`: parameters, FLOPs and memory of a recipe, before a GPU is booked."""
