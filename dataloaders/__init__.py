"""Data sets by name: functions (*, knobs) -> FrameIndex. A new one is one new file and one line here."""

DATASETS = {
    "a2d2": "dataloaders.a2d2:a2d2",
    "folder": "dataloaders.folder:folder",
    "cityscapes": "dataloaders.cityscapes:cityscapes",
    "roadscenes": "dataloaders.roadscenes:roadscenes",
}
