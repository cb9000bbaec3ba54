"""The guard inside other people's trainers. One file each, imported only when used: nothing here imports any of them."""
