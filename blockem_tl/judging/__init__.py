"""Language models as judges, behind the one Judge protocol: rubrics as data files, endpoints, in-process vLLM, verdicts kept on disk."""
