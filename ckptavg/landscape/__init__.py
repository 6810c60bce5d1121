"""Loss and error around weights, and between them: rays, segments, planes."""
