"""Pictures and pages made of finished evaluations."""
