"""What a run will take, told from its configuration: memory, disk, bytes between ranks; and by timing, hours."""
