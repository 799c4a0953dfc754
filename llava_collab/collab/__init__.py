"""Large and small models as one model: leaves, composites, gates, hints, and what one model learns from another."""
