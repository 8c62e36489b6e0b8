"""Ray mechanics that know no stage: pools of replicas, weights by version."""
