//! The thread team: every index once, disjoint pieces, panics, nesting and parking.

use kvwarp::threads::{Team, physical_cores, share};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[test]
fn every_worker_runs_once_in_every_region() {
    for workers in [1, 2, 3, 5] {
        let team = Team::new(workers);
        assert_eq!(team.workers(), workers);
        let counts: Vec<_> = (0..workers).map(|_| AtomicUsize::new(0)).collect();
        for _ in 0..2000 {
            team.run(|worker, of| {
                assert_eq!(of, workers);
                counts[worker].fetch_add(1, Ordering::Relaxed);
            });
        }
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 2000), "{counts:?}");
    }
}

#[test]
fn results_written_by_members_are_visible_after_the_region() {
    let team = Team::new(2);
    let mut data = vec![0u64; 1003];
    for round in 1..200 {
        team.each_chunk(&mut data, 10, |index, piece| {
            assert_eq!(piece.len(), if index == 100 { 3 } else { 10 });
            piece.iter_mut().enumerate().for_each(|(i, v)| *v = round * (index * 10 + i) as u64);
        });
        assert!(data.iter().enumerate().all(|(i, &v)| v == round * i as u64));
    }
}

#[test]
fn each_takes_every_item_once() {
    let team = Team::new(3);
    for count in [0, 1, 2, 97] {
        let seen = Mutex::new(Vec::new());
        team.each(count, |item| seen.lock().unwrap().push(item));
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, (0..count).collect::<Vec<_>>());
    }
}

#[test]
fn members_work_at_the_same_time() {
    let team = Team::new(2);
    let started = AtomicUsize::new(0);
    let met = AtomicUsize::new(0);
    team.run(|_, _| {
        started.fetch_add(1, Ordering::SeqCst);
        let deadline = Instant::now() + Duration::from_secs(20);
        while started.load(Ordering::SeqCst) < 2 && Instant::now() < deadline {
            std::thread::yield_now();
        }
        met.fetch_add(started.load(Ordering::SeqCst), Ordering::SeqCst);
    });
    assert_eq!(met.load(Ordering::SeqCst), 4);
}

#[test]
fn a_panic_reaches_the_caller_and_the_team_stays_usable() {
    let team = Team::new(2);
    for bad in [0, 1] {
        let region = || team.run(|worker, _| assert_ne!(worker, bad, "planted"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(region)).is_err());
        let sum = AtomicUsize::new(0);
        team.run(|worker, _| {
            sum.fetch_add(worker + 1, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 3);
    }
}

#[test]
fn nested_and_concurrent_regions_finish() {
    let team = Team::new(2);
    let sum = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..100 {
                    team.run(|_, _| {
                        team.run(|_, _| {
                            sum.fetch_add(1, Ordering::Relaxed);
                        })
                    });
                }
            });
        }
    });
    assert_eq!(sum.into_inner(), 3 * 100 * 4);
}

#[test]
fn parked_members_wake() {
    let team = Team::new(4);
    for _ in 0..20 {
        let sum = AtomicUsize::new(0);
        std::thread::sleep(Duration::from_millis(2));
        team.run(|worker, _| {
            sum.fetch_add(1 << (8 * worker), Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 0x0101_0101);
    }
}

#[test]
fn shares_cover_everything_in_whole_grains() {
    for (len, grain, workers) in [(0, 4, 3), (10, 4, 3), (576, 8, 2), (49152, 16, 7), (5, 1, 8)] {
        let mut next = 0;
        for worker in 0..workers {
            let part = share(len, grain, worker, workers);
            assert_eq!(part.start, next);
            assert!(part.start == len || part.start.is_multiple_of(grain));
            next = part.end;
        }
        assert_eq!(next, len);
    }
    assert!(physical_cores() >= 1);
}
