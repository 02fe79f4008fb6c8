"""Settings of a study of seconds."""

from dataclasses import replace

from workflows.study.config import StudyConfig, study_preset


def small_study() -> StudyConfig:
    """Return a study with a tiny network, three steps of the joint network and four of a method."""
    whole = study_preset("quick")
    return replace(
        whole,
        model=replace(whole.model, dim=16, layers=1, heads=1),
        joint_batch=4,
        joint_chunks=(3,),
        joint_steps=3,
        batch=4,
        chunks=(3,),
        steps=4,
        method=replace(whole.method, real_until=1, free_from=2, fake_from=2, dmd_from=3, dmd_ramp=1),
        counts=(1, 2),
        clips=3,
        seconds=3.0,
        long_clips=1,
        long_seconds=4.0,
        windows="0-1,1-3,3-4",
    )
