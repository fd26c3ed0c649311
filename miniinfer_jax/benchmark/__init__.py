"""What a run costs, what the device can give, and how near the engine comes: `miniinfer bench`."""
