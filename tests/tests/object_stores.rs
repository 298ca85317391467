//! Repositories in object stores: real servers, and what networks and servers do to requests.

use icecore_tests::{Icecore, ObjectServer, ObjectStore, Result, SECRET_KEY, acceptance};

/// A repository that nothing of is there before.
const PLACE: &str = "s3://laboratory/site/one";

fn accepted_at(server: ObjectServer) -> Result<()> {
    let Some(store) = ObjectStore::start(server)? else { return Ok(()) };
    acceptance(&store.site(PLACE))
}

#[test]
fn rclone_is_accepted() -> Result<()> {
    accepted_at(ObjectServer::Rclone)
}

#[test]
fn moto_is_accepted() -> Result<()> {
    accepted_at(ObjectServer::Moto)
}

#[test]
fn ceph_is_accepted() -> Result<()> {
    accepted_at(ObjectServer::Ceph)
}

#[test]
fn a_wrong_secret_is_said_and_never_shown() -> Result<()> {
    let Some(store) = ObjectStore::start(ObjectServer::Rclone)? else { return Ok(()) };
    let icecore = Icecore::at(&store.site(PLACE))?;
    let info = || icecore.command("repo").args(["info", PLACE]);
    info().succeed()?;
    let wrong = info().env("AWS_SECRET_ACCESS_KEY", "no-such-secret").expect(1)?;
    assert!(wrong.stderr.contains("check the keys"), "{wrong:?}");
    for shown in [&wrong.stderr, &wrong.stdout] {
        assert!(!shown.contains("no-such-secret") && !shown.contains(SECRET_KEY), "{wrong:?}");
    }
    let none = info().env("AWS_SECRET_ACCESS_KEY", "").expect(1)?;
    assert!(none.stderr.contains("AWS_SECRET_ACCESS_KEY is not set"), "{none:?}");
    let nobody = info().env("AWS_ENDPOINT_URL", "http://127.0.0.1:9").expect(1)?;
    assert!(nobody.stderr.contains("cannot be reached"), "{nobody:?}");
    let elsewhere = icecore.command("repo").args(["info", "s3://no-such-bucket/x"]).expect(2)?;
    assert!(elsewhere.stderr.contains("no Icecore repository"), "{elsewhere:?}");
    icecore.command("repo").args(["init", PLACE]).expect(3)?;
    Ok(())
}
