"""The parts of ``StorageSuite``, one promise's family each."""
