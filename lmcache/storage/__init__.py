"""What is stored and where: `manager.py` decides, `l1.py` keeps the entries, `extents.py` the free space."""
