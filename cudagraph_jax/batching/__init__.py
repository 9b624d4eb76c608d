"""Single ragged requests become calls: the queue, composition by measured cost, rows, packing."""
