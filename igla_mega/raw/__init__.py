"""Find and open the files of raw text: what the rooms above read."""
