"""Tables: what trees of a TableDrafter grow from, one file each."""
