"""Child processes: one per heavy stage, supervised, measured and never orphaned."""
